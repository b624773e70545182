"""What the paper reports (Zhu et al., NeurIPS 2024, arXiv:2410.12490): ImageNet-1k, 256 px, FID and IS by
torch-fidelity.

Copied from the paper for comparison; none of these values was computed by this software.
"""

TABLE1 = {  # DINOv2 and MAGE's VQGAN; the paper does not say whether cosines are of features or of codes
    "snr": [30, 25, 20, 15, 10, 5, 1, 0.01],
    "vq": {
        "token_change": [0.187, 0.317, 0.487, 0.663, 0.805, 0.901, 0.948, 0.956],
        "cosine": [0.972, 0.949, 0.910, 0.853, 0.777, 0.682, 0.594, 0.571],
    },
    "discriminative": {
        "token_change": [0.114, 0.178, 0.260, 0.355, 0.457, 0.570, 0.687, 0.721],
        "cosine": [0.975, 0.960, 0.940, 0.916, 0.888, 0.855, 0.816, 0.803],
    },
}
TABLE2 = {"DiGIT, 219 M": 71.7, "DiGIT, 732 M": 80.3, "VIM + VQGAN, 650 M": 61.8}  # top-1, %
VALIDATION = {  # last rows of Tables 3 and 4
    "validation data: DiGIT + VQ": (1.92, 184.40),
    "validation data: VQ only": (1.67, 175.56),
}
TABLE3 = {  # method -> (FID, IS), unconditional
    "DiGIT + AR": (9.13, 73.85),
    "DiGIT + MaskGIT": (9.04, 75.04),
    "VQ-only AR": (24.38, 30.93),
    "VQ-only MaskGIT": (20.7, 42.08),
} | VALIDATION
TABLE4 = {  # class-conditional
    "DiGIT + AR": (4.79, 142.87),
    "DiGIT + MaskGIT": (4.62, 146.19),
    "VQ-only AR": (18.65, 80.4),
    "VQ-only MaskGIT": (6.18, 182.1),
} | VALIDATION
FIG3A = {
    "VQ tokens": (24.38, 30.93),
    "+ discriminative tokens": (9.66, 69.15),
    "+ longer training": (9.13, 73.85),
    "+ larger model": (4.59, 141.29),
}
FIG4A = {  # encoder -> (kind, FID, IS, Acc@LP, Acc@OL); P patch, G global, D discriminative, R reconstructive
    "MAE": ("P+R", 45.51, 18.39, 31.40, 75.8),
    "MoCo": ("G+D", 20.38, 45.02, 59.22, 76.7),
    "iBOT": ("P+D", 16.81, 57.88, 61.10, 76.0),
    "VQGAN": ("-", 24.38, 30.93, None, None),
}
