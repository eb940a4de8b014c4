package sdlite

import android.graphics.Bitmap
import android.graphics.Color
import java.io.DataInputStream
import java.io.File

/** One picture from a folder that `sdlite export MODEL --target ncnn-fp16` made. Call it off the main thread. */
object Sdlite {
    init { System.loadLibrary("sdlite") }

    @JvmStatic private external fun picture(folder: String, inputs: String, out: String): String?

    /** folder: the export, copied to filesDir; inputs: what inputs.py wrote. */
    fun generate(folder: File, inputs: File, cache: File): Bitmap {
        val out = File(cache, "picture.ppm")
        picture(folder.path, inputs.path, out.path)?.let { throw IllegalStateException(it) }
        DataInputStream(out.inputStream().buffered()).use { ppm ->
            val (_, width, height, _) = generateSequence { ppm.read().toChar() }.takeWhile { it != '\n' }.joinToString("").split(" ")
            val pixels = IntArray(width.toInt() * height.toInt()) {
                Color.rgb(ppm.readUnsignedByte(), ppm.readUnsignedByte(), ppm.readUnsignedByte())
            }
            return Bitmap.createBitmap(pixels, width.toInt(), height.toInt(), Bitmap.Config.ARGB_8888)
        }
    }
}
