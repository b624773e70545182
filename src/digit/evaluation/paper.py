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


def generation_rows(table: str) -> tuple[Generation, ...]:
    """Rows from lines `type | method | parameters | epochs | FID | IS | label of our row`; † trained with guidance."""
    rows = []
    for line in table.strip().splitlines():
        kind, method, parameters, epochs, fid, inception, ours = (cell.strip() for cell in line.split("|"))
        score = float(inception.removesuffix("†")) if inception else None
        guided, distance = fid.endswith("†"), float(fid.removesuffix("†"))
        about: dict[str, str] = dict(kind=kind, method=method, parameters=parameters, epochs=epochs, ours=ours)
        rows.append(Generation(**about, fid=distance, inception=score, guided=guided))
    return tuple(rows)


# last rows of Tables 3 and 4
VALIDATION_ROWS = generation_rows("""
data | validation data, DiGIT + VQ |  |  | 1.92 | 184.40 | validation data: DiGIT + VQ
data | validation data, VQ only    |  |  | 1.67 | 175.56 | validation data: VQ only
""")
# unconditional
TABLE3_ROWS = (
    generation_rows("""
GAN       | BigGAN           | 70M   |      | 38.6  | 24.70  |
diffusion | LDM              | 395M  |      | 39.1  | 22.83  |
diffusion | ADM              | 554M  |      | 26.2  | 39.70  |
masked    | MAGE             | 200M  | 1600 | 11.1  | 81.17  |
masked    | MAGE             | 463M  | 1600 | 9.10  | 105.1  |
masked    | MaskGIT          | 227M  | 300  | 20.7  | 42.08  | VQ-only MaskGIT
masked    | DiGIT (+MaskGIT) | 219M  | 200  | 9.04  | 75.04  | DiGIT + MaskGIT
AR        | VQGAN            | 214M  | 200  | 24.38 | 30.93  | VQ-only AR, own epochs
AR        | GIVT             | 304M  | 500  | 17.70 |        |
AR        | GIVT             | 1.67B | 500  | 11.02 |        |
AR        | DiGIT (+VQGAN)   | 219M  | 400  | 9.13  | 73.85  | DiGIT + AR
AR        | DiGIT (+VQGAN)   | 732M  | 200  | 4.59  | 141.29 | DiGIT + AR, large
""")
    + VALIDATION_ROWS
)
# class-conditional
TABLE4_ROWS = (
    generation_rows("""
GAN       | BigGAN              | 160M  |      | 6.95  | 198.2  |
diffusion | ADM                 | 554M  |      | 10.94 | 101.0  |
diffusion | LDM-4               | 400M  |      | 10.56 | 103.5  |
diffusion | DiT-XL/2            | 675M  |      | 9.62  | 121.50 |
diffusion | L-DiT-7B            | 7B    |      | 6.09  | 153.32 |
masked    | Contextual RQ-Trans | 371M  | 300  | 5.45  | 172.6  |
masked+AR | VAR                 | 310M  | 200  | 4.64  |        |
masked+AR | VAR                 | 310M  | 200  | 3.60† | 257.5† |
masked+AR | VAR                 | 600M  | 250  | 2.95† | 306.1† |
masked    | MAGVIT-v2           | 307M  | 1080 | 3.65  | 200.5  |
AR        | VQVAE-2             | 13.5B |      | 31.11 | 45     |
AR        | RQ-Trans            | 480M  |      | 15.72 | 86.8   |
AR        | RQ-Trans            | 3.8B  |      | 7.55  | 134.0  |
AR        | ViTVQGAN            | 650M  | 360  | 11.20 | 97.2   |
AR        | ViTVQGAN            | 1.7B  | 360  | 5.3   | 149.9  |
AR        | GIVT                | 304M  | 500  | 5.67  |        |
AR        | GIVT                | 1.67B | 500  | 3.46  |        |
masked    | MaskGIT             | 227M  | 300  | 6.18  | 182.1  | VQ-only MaskGIT
masked    | DiGIT (+MaskGIT)    | 219M  | 200  | 4.62  | 146.19 | DiGIT + MaskGIT
AR        | VQGAN               | 227M  | 300  | 18.65 | 80.4   | VQ-only AR, own epochs
AR        | DiGIT (+VQGAN)      | 219M  | 400  | 4.79  | 142.87 | DiGIT + AR
AR        | DiGIT (+VQGAN)      | 732M  | 200  | 3.39  | 205.96 | DiGIT + AR, large
""")
    + VALIDATION_ROWS
)


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
