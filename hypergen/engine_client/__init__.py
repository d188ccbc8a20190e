"""The HTTP process's side of the engine processes; imports no torch."""
