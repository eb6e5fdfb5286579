"""The app: a page in the browser to draw from a flow, and to see how it reads an image."""
