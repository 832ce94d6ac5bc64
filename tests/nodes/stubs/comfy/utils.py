"""What the integration only looks for."""
