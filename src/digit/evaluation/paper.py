"""What the paper reports (Zhu et al., NeurIPS 2024, arXiv:2410.12490): ImageNet-1k, 256 px, FID and IS by
torch-fidelity.

Copied from the paper for comparison; none of these values was computed by this software. A row with `ours` has a row of
that label in our table; the others are the paper's comparison with other work, which it cites in turn.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One row of Table 3 or 4."""

    kind: str
    """GAN, diffusion, masked (MIM), AR, or data."""
    method: str
    parameters: str = ""
    epochs: str = ""
    fid: float
    inception: float | None = None
    guided: bool = False
    """Trained with classifier-free guidance (a dagger in the paper)."""
    ours: str = ""
    """Label of the row that measures it here."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One row of Table 2: top-1 of a linear probe, %."""

    method: str
    tokens: str
    features: int
    parameters: str
    top1: float
    ours: str = ""
    """Label of the row that measures it here."""


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
TABLE2_ROWS = tuple(
    Probe(method=method, tokens=tokens, features=features, parameters=parameters, top1=top1, ours=ours)
    for method, tokens, features, parameters, top1, ours in (
        ("iGPT-L", "32 x 32", 1536, "1362M", 60.3, ""),
        ("iGPT-XL", "64 x 64", 3072, "6801M", 68.7, ""),
        ("VIM+VQGAN", "32 x 32", 1024, "650M", 61.8, ""),
        ("VIM+dVAE", "32 x 32", 1024, "650M", 63.8, ""),
        ("GIVT", "16 x 16", 1024, "304M", 65.1, ""),
        ("VIM+ViT-VQGAN", "32 x 32", 1024, "650M", 65.1, ""),
        ("VIM+ViT-VQGAN", "32 x 32", 2048, "1697M", 73.2, ""),
        ("AIM", "16 x 16", 1536, "0.6B", 70.5, ""),
        ("DiGIT", "16 x 16", 1024, "219M", 71.7, "DiGIT"),
        ("DiGIT", "16 x 16", 1536, "732M", 80.3, "DiGIT, large"),
    )
)
VALIDATION_ROWS = (  # last rows of Tables 3 and 4
    Generation(
        kind="data",
        method="validation data, DiGIT + VQ",
        fid=1.92,
        inception=184.40,
        ours="validation data: DiGIT + VQ",
    ),
    Generation(
        kind="data", method="validation data, VQ only", fid=1.67, inception=175.56, ours="validation data: VQ only"
    ),
)
TABLE3_ROWS = (  # unconditional
    Generation(kind="GAN", method="BigGAN", parameters="70M", fid=38.6, inception=24.70),
    Generation(kind="diffusion", method="LDM", parameters="395M", fid=39.1, inception=22.83),
    Generation(kind="diffusion", method="ADM", parameters="554M", fid=26.2, inception=39.70),
    Generation(kind="masked", method="MAGE", parameters="200M", epochs="1600", fid=11.1, inception=81.17),
    Generation(kind="masked", method="MAGE", parameters="463M", epochs="1600", fid=9.10, inception=105.1),
    Generation(
        kind="masked", method="MaskGIT", parameters="227M", epochs="300", fid=20.7, inception=42.08,
        ours="VQ-only MaskGIT",
    ),
    Generation(
        kind="masked", method="DiGIT (+MaskGIT)", parameters="219M", epochs="200", fid=9.04, inception=75.04,
        ours="DiGIT + MaskGIT",
    ),
    Generation(
        kind="AR", method="VQGAN", parameters="214M", epochs="200", fid=24.38, inception=30.93,
        ours="VQ-only AR, own epochs",
    ),
    Generation(kind="AR", method="GIVT", parameters="304M", epochs="500", fid=17.70),
    Generation(kind="AR", method="GIVT", parameters="1.67B", epochs="500", fid=11.02),
    Generation(
        kind="AR", method="DiGIT (+VQGAN)", parameters="219M", epochs="400", fid=9.13, inception=73.85,
        ours="DiGIT + AR",
    ),
    Generation(
        kind="AR", method="DiGIT (+VQGAN)", parameters="732M", epochs="200", fid=4.59, inception=141.29,
        ours="DiGIT + AR, large",
    ),
    *VALIDATION_ROWS,
)  # fmt: skip
TABLE4_ROWS = (  # class-conditional
    Generation(kind="GAN", method="BigGAN", parameters="160M", fid=6.95, inception=198.2),
    Generation(kind="diffusion", method="ADM", parameters="554M", fid=10.94, inception=101.0),
    Generation(kind="diffusion", method="LDM-4", parameters="400M", fid=10.56, inception=103.5),
    Generation(kind="diffusion", method="DiT-XL/2", parameters="675M", fid=9.62, inception=121.50),
    Generation(kind="diffusion", method="L-DiT-7B", parameters="7B", fid=6.09, inception=153.32),
    Generation(kind="masked", method="Contextual RQ-Trans", parameters="371M", epochs="300", fid=5.45, inception=172.6),
    Generation(kind="masked+AR", method="VAR", parameters="310M", epochs="200", fid=4.64),
    Generation(kind="masked+AR", method="VAR", parameters="310M", epochs="200", fid=3.60, inception=257.5, guided=True),
    Generation(kind="masked+AR", method="VAR", parameters="600M", epochs="250", fid=2.95, inception=306.1, guided=True),
    Generation(kind="masked", method="MAGVIT-v2", parameters="307M", epochs="1080", fid=3.65, inception=200.5),
    Generation(kind="AR", method="VQVAE-2", parameters="13.5B", fid=31.11, inception=45),
    Generation(kind="AR", method="RQ-Trans", parameters="480M", fid=15.72, inception=86.8),
    Generation(kind="AR", method="RQ-Trans", parameters="3.8B", fid=7.55, inception=134.0),
    Generation(kind="AR", method="ViTVQGAN", parameters="650M", epochs="360", fid=11.20, inception=97.2),
    Generation(kind="AR", method="ViTVQGAN", parameters="1.7B", epochs="360", fid=5.3, inception=149.9),
    Generation(kind="AR", method="GIVT", parameters="304M", epochs="500", fid=5.67),
    Generation(kind="AR", method="GIVT", parameters="1.67B", epochs="500", fid=3.46),
    Generation(
        kind="masked", method="MaskGIT", parameters="227M", epochs="300", fid=6.18, inception=182.1,
        ours="VQ-only MaskGIT",
    ),
    Generation(
        kind="masked", method="DiGIT (+MaskGIT)", parameters="219M", epochs="200", fid=4.62, inception=146.19,
        ours="DiGIT + MaskGIT",
    ),
    Generation(
        kind="AR", method="VQGAN", parameters="227M", epochs="300", fid=18.65, inception=80.4,
        ours="VQ-only AR, own epochs",
    ),
    Generation(
        kind="AR", method="DiGIT (+VQGAN)", parameters="219M", epochs="400", fid=4.79, inception=142.87,
        ours="DiGIT + AR",
    ),
    Generation(
        kind="AR", method="DiGIT (+VQGAN)", parameters="732M", epochs="200", fid=3.39, inception=205.96,
        ours="DiGIT + AR, large",
    ),
    *VALIDATION_ROWS,
)  # fmt: skip


def by_label(rows: Iterable[Generation]) -> dict[str, tuple[float, float | str]]:
    """Label of our row -> (FID, IS) of the paper's."""
    return {row.ours: (row.fid, "" if row.inception is None else row.inception) for row in rows if row.ours}


TABLE2 = {"DiGIT, 219 M": 71.7, "DiGIT, 732 M": 80.3, "VIM + VQGAN, 650 M": 61.8}  # top-1, %
TABLE3, TABLE4 = by_label(TABLE3_ROWS), by_label(TABLE4_ROWS)
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


def cited_generation(rows: Iterable[Generation]) -> str:
    """Markdown: the rows of other work, which we do not measure."""
    lines = [
        "| cited from the paper, not measured here | type | parameters | epochs | FID | IS |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.ours:
            dagger = "†" if row.guided else ""
            score = "" if row.inception is None else f"{row.inception:g}{dagger}"
            cells = (row.method, row.kind, row.parameters, row.epochs, f"{row.fid:g}{dagger}", score)
            lines.append(f"| *{cells[0]}* | {' | '.join(cells[1:])} |")
    note = ["", "† trained with classifier-free guidance."] if any(row.guided for row in rows) else []
    return "\n".join(lines + note)


def cited_probes() -> str:
    """Markdown: the rows of Table 2 of other work, which we do not measure."""
    lines = [
        "| cited from the paper, not measured here | tokens | features | parameters | top-1, % |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| *{row.method}* | {row.tokens} | {row.features} | {row.parameters} | {row.top1:g} |"
        for row in TABLE2_ROWS
        if not row.ours
    ]
    return "\n".join(lines)
