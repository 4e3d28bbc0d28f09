"""Parameters and rows in, nats out. What is done with the nats is not known here."""
