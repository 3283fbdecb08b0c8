"""Published checkpoints in the layout of Hugging Face, in and out.

importer      a folder of safetensors becomes a run
exporter      a run becomes such a folder
peft        adapters in PEFT's layout
families/   which tensor of a family is which parameter, in both directions
safetensors  the file format
"""
