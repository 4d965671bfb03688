"""The project's folders, from one root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DECODED = ROOT / "cache/decoded"  # decoded images: what is missing is decoded again
LATENTS = ROOT / "cache/latents"  # encoded images: what is missing is encoded again
