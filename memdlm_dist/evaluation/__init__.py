"""What a trained model can do: needle tasks, exposure bias, and the lm-evaluation-harness."""
