"""Where the inputs of frames come from in backward: one file for each source."""
