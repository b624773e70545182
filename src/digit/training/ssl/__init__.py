"""Self-supervised training of small ViT encoders: MAE, MoCo v3, DINO and iBOT around one ViT, one set of views."""

from digit.training.ssl.train import METHODS, MethodName, SSLConfig, train_ssl

__all__ = ["METHODS", "MethodName", "SSLConfig", "train_ssl"]
