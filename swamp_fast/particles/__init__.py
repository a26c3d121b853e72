"""What a particle is: a row of the bank with its random draws, schedule, dropout and norms."""
