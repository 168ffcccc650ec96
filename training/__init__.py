"""Photo-tile pairs, contrastive fine-tuning of the map encoders, and the built-in planet's encoders."""
