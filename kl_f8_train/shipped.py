"""What ships with the package: a small base in kl-f8's place, and photographs for the demo."""

from pathlib import Path

FOLDER = Path(__file__).with_name("mini")
BASE_NAME = "kl_f8_mini"  # as a recipe or a command names it
WEIGHTS = FOLDER / f"{BASE_NAME}.safetensors"
TRAINING = FOLDER / "training"  # photographs, shorter side 320
HELD_OUT = FOLDER / "held_out"  # photographs, 256 x 256
