"""How the candidates of a level are scored, which of them stay, and what the scores say of the answer."""
