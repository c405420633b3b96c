"""One forward of a model, recorded: where its attention calls are, and what each is."""
