"""A tiny family of models to try things on, and a tour of the library with it."""
