"""Published checkpoints in the layout of Hugging Face, in and out.

importer     a folder of safetensors becomes a run
exporter     a run becomes such a folder
peft         adapters in PEFT's layout
families/    the parameter of each tensor of a family, in both directions
safetensors  the file format
"""
