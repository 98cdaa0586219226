"""From what people send to what a model reads: pictures, chat templates, tokenizers.

In: text, messages, pictures, the settings of a model.
Out: token ids and pixel values.
"""
