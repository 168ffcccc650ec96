"""The search as a service: HTTP in front of one engine whose encoders all requests share."""
