"""What several parts do with arguments, containers and files."""
