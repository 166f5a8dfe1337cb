"""What only an accelerator can show: `pytest -m gpu`."""
