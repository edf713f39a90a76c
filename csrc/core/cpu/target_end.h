// Ends what core/cpu/target_begin.h began.
#ifdef DNL_TARGET
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
