/* Everything that TensorRT's Python bindings import from its libraries, giving nothing back: the classes, enums
   and docstrings of the bindings can then be loaded without the libraries. */
#ifdef __cplusplus
extern "C" {
#endif
#define GIVES_NOTHING(name) void *name(void) { return 0; }
GIVES_NOTHING(createInferBuilder_INTERNAL)
GIVES_NOTHING(createInferRefitter_INTERNAL)
GIVES_NOTHING(createInferRuntime_INTERNAL)
GIVES_NOTHING(createNvOnnxParser_INTERNAL)
GIVES_NOTHING(createNvOnnxParserRefitter_INTERNAL)
GIVES_NOTHING(getBuilderPluginRegistry)
GIVES_NOTHING(getPluginRegistry)
GIVES_NOTHING(initLibNvInferPlugins)
int getNvOnnxParserVersion(void) { return 0; }
#ifdef __cplusplus
}
#endif
