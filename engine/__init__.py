"""What runs when a photo is located: tiles, sources, backends, search, results."""
