"""Writers for results: JSON, GeoJSON, a table for the terminal, and a self-contained HTML map."""
