"""What a graph proves about a mask."""
