"""What people have -> a diffusers folder that `sdlite.convert` reads: one file in the original key
layout, LoRAs, textual inversions, pickles.

    source  folder | model.safetensors | model.ckpt (from_pickle)     [vae= where it holds none]
    extras  lora=["style.safetensors:0.8"]  embedding=["word.safetensors"]

`sources.prepared` does all of it; nothing is fetched, and no pickle is read unless it is asked for.
"""
