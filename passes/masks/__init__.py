"""What a graph proves of a mask."""
