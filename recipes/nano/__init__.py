"""The small model `nano`: synthetic scenes, what to ask about them, and its training from nothing."""
