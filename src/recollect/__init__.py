"""Train networks whose depth has outgrown memory."""
