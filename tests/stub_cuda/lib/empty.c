/* libcurand.so.10 and libnvrtc.so.13: opened by name or linked, but no function of theirs is called. */
int stub_is_empty = 1;
