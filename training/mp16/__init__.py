"""From a list of photos and places, such as MP-16's, to shards of photos for training and tests."""
