"""Stage 1 of SLA2 (Alg. 1): train the sites of a frozen model against its full attention."""
