"""From PyTorch encoders to engine bundles."""
