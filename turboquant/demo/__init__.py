"""The embedded demo model: a byte-level Llama small enough to ship, and the script that trained it.

Read in this order: `corpus` (what it learns from, what is held out), `model` (the network and its
Hugging Face folder), `muon` (the optimiser), `train` (the loop), `evaluate` (bits per byte against
`xz -9`).  Using the model needs none of them: `model/` is an ordinary Hugging Face folder.
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The trained model, shipped as package data: weights, config, tokenizer, log and model card."""
