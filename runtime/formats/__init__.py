"""How numbers are stored: in 8 and 4 bits, rounded by chance, and as the state that is saved."""
