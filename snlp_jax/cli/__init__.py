"""The command lines, on the roof of the house: nothing imports them but scripts, tests and each other."""
