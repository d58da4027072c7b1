/* SPDX-License-Identifier: Apache-2.0
   The same as xrt_host.cpp for XRT's C API, and with HOW: many (runs it a thousand times). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uuid/uuid.h>

#include <xrt/xrt_bo.h>
#include <xrt/xrt_device.h>
#include <xrt/xrt_kernel.h>

static char* contents(const char* path, size_t* size) {
    FILE* file = fopen(path, "rb");
    fseek(file, 0, SEEK_END);
    *size = ftell(file);
    rewind(file);
    char* data = malloc(*size);
    if (fread(data, 1, *size, file) != *size) exit(3);
    fclose(file);
    return data;
}

static long resident(void) { /* KiB */
    char line[256];
    long kib = 0;
    FILE* file = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "VmRSS: %ld", &kib) == 1) break;
    fclose(file);
    return kib;
}

int main(int argc, char** argv) {
    (void)argc;
    size_t kv_size, job_size;
    char *pages = contents(argv[2], &kv_size), *job = contents(argv[3], &job_size);
    xrtDeviceHandle device = xrtDeviceOpen(0);
    uuid_t uuid;
    if (!device || xrtDeviceLoadXclbinFile(device, argv[1])) return 3;
    xrtDeviceGetXclbinUUID(device, uuid);
    xrtKernelHandle kernel = xrtPLKernelOpen(device, uuid, "nearkv");
    xrtBufferHandle kv_bo = xrtBOAlloc(device, kv_size, 1u << 30, xrtKernelArgGroupId(kernel, 0));
    xrtBufferHandle job_bo = xrtBOAlloc(device, job_size, 0, xrtKernelArgGroupId(kernel, 1));
    if (!kernel || !kv_bo || !job_bo) return 3;
    memcpy(xrtBOMap(kv_bo), pages, kv_size);
    memcpy(xrtBOMap(job_bo), job, job_size);
    xrtBOSync(job_bo, XCL_BO_SYNC_BO_TO_DEVICE, job_size, 0);
    xrtRunHandle run = xrtRunOpen(kernel);
    xrtRunSetArg(run, 0, kv_bo);
    xrtRunSetArg(run, 1, job_bo);
    for (int i = 0; i < 3; ++i) xrtRunSetArg(run, 2 + i, (unsigned)strtoul(argv[4 + i], NULL, 10));
    long before = 0;
    int runs = strcmp(argv[8], "many") ? 1 : 1000;
    for (int i = 0; i < runs; ++i) {
        if (xrtRunStart(run) || xrtRunWait(run) != ERT_CMD_STATE_COMPLETED) return 4;
        if (i == 9) before = resident();
    }
    if (before) printf("%ld KiB more\n", resident() - before);
    xrtBOSync(job_bo, XCL_BO_SYNC_BO_FROM_DEVICE, job_size, 0);
    FILE* out = fopen(argv[7], "wb");
    fwrite(xrtBOMap(job_bo), 1, job_size, out);
    fclose(out);
    xrtRunClose(run);
    xrtBOFree(job_bo);
    xrtBOFree(kv_bo);
    xrtKernelClose(kernel);
    return xrtDeviceClose(device);
}
