"""The specification: SLA2 written plainly over dense maps, and its sparse branch in INT8 and FP8."""
