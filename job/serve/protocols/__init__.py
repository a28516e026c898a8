"""From requests to images and from predictions to answers, one module per protocol."""
