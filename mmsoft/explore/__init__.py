"""The explorer: a web page that looks into the attention of a model, image by image.

``python -m mmsoft.explore`` starts it. Nothing else imports this package.
"""
