"""Files that ship with the package: the demo's pre-trained base model."""

from pathlib import Path


def demo_model_path() -> Path:
    """Returns the directory of the demo model (Hugging Face layout, float32, with its tokenizer).

    Raises ``FileNotFoundError`` when the installation lacks it; nothing is downloaded.
    """
    path = Path(__file__).resolve().parent / "demo_model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo model is missing: {path / 'model.safetensors'}; make it with "
            f"`python examples/demo_model/pretrain.py --out {path}`, or set model.path to a model of your own"
        )
    return path
