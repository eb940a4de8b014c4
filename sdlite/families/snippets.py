"""Python code in an export's README that makes what the UNet is given besides latents and timestep:
`conditions`, for each call of a step a dict of the UNet's inputs. See `Family.snippet`.
"""

from __future__ import annotations

_PADDED = """    padded = {"padding": "max_length", "max_length": @WINDOW@, "truncation": True}
"""
ENCODE = f"""
tokenizer, text_encoder = CLIPTokenizer.from_pretrained("tokenizer"), load("text_encoder")


def encode(text):
{_PADDED}    ids = tokenizer(text, return_tensors="np", **padded).input_ids
    made = text_encoder(input_ids=ids.astype(np.int64))
    return {{"encoder_hidden_states": made["last_hidden_state"]}}


conditions = [encode(prompt)]
"""
GUIDED = """if guidance > 1:  # a second call in each step
    conditions.append(encode(negative_prompt or ""))
"""

# --- LCM: `sdlite.families.sd.guidance_embedding` without sdlite; %d is its width

EMBEDDED = """half = %d // 2  # the guidance is an input: no second call, no negative prompt
angles = np.exp(np.arange(half) * -np.log(10000) / (half - 1)) * 1000 * (guidance - 1)
embedded = np.concatenate([np.sin(angles), np.cos(angles)])[None].astype(np.float32)
conditions[0]["timestep_cond"] = embedded
"""

# --- SDXL: two encoders, pooled text, sizes

ENCODE_TWO = f"""
pairs = [
    (CLIPTokenizer.from_pretrained("tokenizer"), load("text_encoder")),
    (CLIPTokenizer.from_pretrained("tokenizer_2"), load("text_encoder_2")),
]


def encode(text):
    states = []
{_PADDED}    for tokenizer, text_encoder in pairs:
        ids = tokenizer(text, return_tensors="np", **padded).input_ids
        made = text_encoder(input_ids=ids.astype(np.int64))
        states += [x for name, x in made.items() if name.startswith("hidden_states.")]
    states = np.concatenate(states, axis=-1)
    return {{"encoder_hidden_states": states, "text_embeds": made["text_embeds"]}}


conditions = [encode(prompt)]
"""
GUIDED_OR_ZEROS = """if guidance > 1 and negative_prompt is None:  # a second call in each step
    conditions.append({name: np.zeros_like(x) for name, x in conditions[0].items()})
elif guidance > 1:
    conditions.append(encode(negative_prompt))
"""
SIZES = """for given in conditions:  # size, top and left of the crop, target size
    given["time_ids"] = np.array([[height, width, 0, 0, height, width]], np.float32)
"""

# --- a ControlNet: %s are channels of the feature maps that it adds to, and how often smaller these
# are than the latents; the last is the middle's

UNCONTROLLED = """added = %s
sides = [(c, -(-(height // @STRIDE@) // n), -(-(width // @STRIDE@) // n)) for c, n in added]
zeros = [np.zeros((1, *side), np.float32) for side in sides]  # without a control image
for given in conditions:
    for i, maps in enumerate(zeros[:-1]):
        given[f"down_block_additional_residual_{i}"] = maps
    given["mid_block_additional_residual"] = zeros[-1]
"""
