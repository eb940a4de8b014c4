"""The Python code in an export's README.md: how a runtime loads a network and makes an image.

`load(part)` gives a function of the names in `sdlite.spec` for one row; what follows is the same
for every runtime. The code stands in the folder, runs there, and imports nothing of sdlite.
"""

from __future__ import annotations

from dataclasses import dataclass

ONNX = """
import numpy as np
import onnxruntime as ort


def load(part):
    session = ort.InferenceSession(f"{part}/model.onnx", providers=["CPUExecutionProvider"])
    return lambda **inputs: session.run(None, inputs)[0]
"""

FUSED = """
import numpy as np
import onnxruntime as ort


def load(part):
    if part != "unet":
        session = ort.InferenceSession(f"{part}/model.onnx", providers=["CPUExecutionProvider"])
        return lambda **inputs: session.run(None, inputs)[0]
    # time.onnx depends on the timestep alone, prompt.onnx on the prompt: once for each will do
    graphs = {
        name: ort.InferenceSession(f"unet/{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("time", "prompt", "step")
    }
    wanted = {i.name for i in graphs["step"].get_inputs()}

    def unet(**inputs):
        for name, given in (("time", "timestep"), ("prompt", "encoder_hidden_states")):
            made = graphs[name].run(None, {given: inputs[given]})
            inputs |= dict(zip([o.name for o in graphs[name].get_outputs()], made))
        return graphs["step"].run(None, {k: v for k, v in inputs.items() if k in wanted})[0]

    return unet
"""

OPENVINO = """
import numpy as np
import openvino as ov

core = ov.Core()


def load(part):
    # OpenVINO's default is the CPU's half precision (bf16) where it has one: faster, other numbers
    network = core.compile_model(f"{part}/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda **inputs: network(inputs)[0].copy()
"""

NCNN = """
import ncnn
import numpy as np

ORDER = {
    "text_encoder": ["input_ids"],
    "unet": ["sample", "timestep", "encoder_hidden_states"],
    "vae_decoder": ["latent_sample"],
}


def load(part):
    net = ncnn.Net()
    # float32 arithmetic; a phone is faster without these three lines
    net.opt.use_fp16_packed = False
    net.opt.use_fp16_storage = False
    net.opt.use_fp16_arithmetic = False
    net.load_param(f"{part}/model.param")
    net.load_model(f"{part}/model.bin")

    def network(**inputs):
        kept = []  # ncnn.Mat does not keep its array alive
        with net.create_extractor() as run:
            for i, name in enumerate(ORDER[part]):
                x = inputs[name]
                x = x.astype(np.int32 if name == "input_ids" else np.float32)
                kept.append(np.ascontiguousarray(x[0] if x.ndim else x.reshape(1)))
                run.input(f"in{i}", ncnn.Mat(kept[-1]))
            return np.array(run.extract("out0")[1])[None]

    return network
"""

MNN = """
import MNN
import MNN.numpy as mnp
import numpy as np

INPUTS = {
    "text_encoder": ["input_ids"],
    "unet": ["sample", "timestep", "encoder_hidden_states"],
    "vae_decoder": ["latent_sample"],
}
OUTPUT = {"text_encoder": "last_hidden_state", "unet": "out_sample", "vae_decoder": "sample"}
runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": 2},))


def load(part):
    module = MNN.nn.load_module_from_file(
        f"{part}/model.mnn", INPUTS[part], [OUTPUT[part]], runtime_manager=runtime
    )

    def network(**inputs):
        given = []
        for name in INPUTS[part]:
            if name == "input_ids":
                given.append(mnp.array(inputs[name].tolist(), dtype=mnp.int32))
            else:
                given.append(mnp.array(np.array(inputs[name], np.float32)))
        return np.array(module.forward(given)[0].read())

    return network
"""

EXECUTORCH = """
import numpy as np
import torch
from executorch.runtime import Runtime


def load(part):
    method = Runtime.get().load_program(f"{part}/model.pte").load_method("forward")

    def network(**inputs):  # by place, in the order of the table
        return method.execute([torch.from_numpy(x) for x in inputs.values()])[0].numpy().copy()

    return network
"""

COREML = """
import coremltools as ct
import numpy as np

OUTPUT = {"text_encoder": "last_hidden_state", "unet": "out_sample", "vae_decoder": "sample"}


def load(part):
    model = ct.models.MLModel(f"{part}/model.mlpackage")  # runs on a Mac

    def network(**inputs):
        given = {k: np.atleast_1d(v) for k, v in inputs.items()}
        if "input_ids" in given:
            given["input_ids"] = given["input_ids"].astype(np.int32)
        return model.predict(given)[OUTPUT[part]]

    return network
"""

TENSORRT = """
import numpy as np
import tensorrt as trt
import torch

OUTPUT = {"text_encoder": "last_hidden_state", "unet": "out_sample", "vae_decoder": "sample"}
runtime = trt.Runtime(trt.Logger())


def load(part):
    with open(f"{part}/model.engine", "rb") as f:
        context = runtime.deserialize_cuda_engine(f.read()).create_execution_context()

    def network(**inputs):
        held = {k: torch.from_numpy(np.ascontiguousarray(v)).cuda() for k, v in inputs.items()}
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        out = torch.empty(tuple(context.get_tensor_shape(OUTPUT[part])), device="cuda")
        context.set_tensor_address(OUTPUT[part], out.data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        return out.cpu().numpy()

    return network
"""

QNN = """
import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn

PROVIDER = "QNNExecutionProvider"
ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())


def load(part):
    options = ort.SessionOptions()
    device = next(d for d in ort.get_ep_devices() if d.ep_name == PROVIDER)
    settings = {"backend_path": qnn.get_qnn_htp_path(), "htp_arch": "@HTP@", "soc_model": "@SOC@"}
    options.add_provider_for_devices([device], settings)
    session = ort.InferenceSession(f"{part}/model.onnx", options)
    return lambda **inputs: session.run(None, inputs)[0]
"""

ONE = """
unet = load("unet")
noise = unet(
    sample=np.zeros(@LATENTS@, np.float32),
    timestep=np.array(500, np.float32),
    encoder_hidden_states=np.zeros(@EMBEDS@, np.float32),
)
print(noise.shape, noise.dtype)
"""

IMAGE = """
import torch
from diffusers import @CLASS@
from PIL import Image
from transformers import CLIPTokenizer

prompt, negative_prompt, seed = @PROMPT@, "", 0
steps, guidance = @STEPS@, @GUIDANCE@

tokenizer = CLIPTokenizer.from_pretrained("tokenizer")
scheduler = @CLASS@.from_pretrained("scheduler"@SETTINGS@)
text_encoder, unet, vae_decoder = load("text_encoder"), load("unet"), load("vae_decoder")


def encode(text):
    padded = {"padding": "max_length", "max_length": @WINDOW@, "truncation": True}
    ids = tokenizer(text, return_tensors="np", **padded).input_ids
    return text_encoder(input_ids=ids.astype(np.int64))


guided = guidance > 1
conditions = [encode(prompt), encode(negative_prompt)] if guided else [encode(prompt)]
scheduler.set_timesteps(steps)
generator = torch.Generator("cpu").manual_seed(seed)
latents = torch.randn(@LATENTS@, generator=generator) * scheduler.init_noise_sigma
for t in scheduler.timesteps:
    sample = scheduler.scale_model_input(latents, t).numpy()
    timestep = np.array(t, np.float32)
    answers = [unet(sample=sample, timestep=timestep, encoder_hidden_states=c) for c in conditions]
    noise = answers[1] + guidance * (answers[0] - answers[1]) if guided else answers[0]
    latents = scheduler.step(torch.from_numpy(noise), t, latents@NOISY@).prev_sample
pixels = vae_decoder(latent_sample=latents.numpy() / np.float32(@SCALING@)@SHIFT@)
image = np.clip(pixels[0].transpose(1, 2, 0) / 2 + 0.5, 0, 1)
Image.fromarray((image * 255).round().astype(np.uint8)).save("image.png")
"""


@dataclass(frozen=True)
class Runtime:
    """What a target's README says.

    Attributes:
        title: the runtime's name.
        install: what pip installs for the first snippet; "" where it is no Python package.
        code: `load`, as above; "" where networks do not run in Python.
        names: "spec", or "ncnn": in0, in1, ... without the batch axis.
        narrow_ids: token ids are int32.
        note: said under the first snippet.
    """

    title: str
    install: str
    code: str
    names: str = "spec"
    narrow_ids: bool = False
    note: str = ""


RUNTIMES = {
    "onnx": Runtime("onnxruntime", "onnxruntime", ONNX),
    "onnx, fused": Runtime(
        "onnxruntime, the UNet in three graphs",
        "onnxruntime",
        FUSED,
        note="`unet/time.onnx`, `unet/prompt.onnx` and `unet/step.onnx` share the UNet's work.",
    ),
    "openvino": Runtime("OpenVINO", "openvino", OPENVINO),
    "ncnn": Runtime("ncnn", "ncnn", NCNN, names="ncnn", narrow_ids=True),
    "mnn": Runtime("MNN", "MNN", MNN, narrow_ids=True),
    "executorch": Runtime("ExecuTorch", "executorch", EXECUTORCH),
    "coreml": Runtime(
        "Core ML",
        "coremltools",
        COREML,
        narrow_ids=True,
        note="Written from coremltools' documentation, not run by us.",
    ),
    "tensorrt": Runtime(
        "TensorRT",
        "tensorrt torch",
        TENSORRT,
        note="Written from TensorRT's documentation, not run by us.",
    ),
    "tensorrt-rtx": Runtime(
        "TensorRT for RTX",
        "tensorrt-rtx torch",
        TENSORRT.replace("import tensorrt as trt", "import tensorrt_rtx as trt"),
        note="Written from TensorRT for RTX's documentation, not run by us.",
    ),
    "qnn": Runtime("Qualcomm's NPU, by onnxruntime-qnn", "onnxruntime onnxruntime-qnn", QNN),
    "web": Runtime("browsers, by onnxruntime-web", "", ""),
}
