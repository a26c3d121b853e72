"""What a particle is: a row of the bank, its random draws, its schedule, its dropout and norms."""
