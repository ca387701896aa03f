/* The few kernel headers that bcc asks for: enough for programs that use UAPI types only. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
