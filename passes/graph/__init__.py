"""Reading and writing graphs, whatever traced them."""
