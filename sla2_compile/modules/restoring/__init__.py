"""What a recorded forward writes to, and how it is put back."""
