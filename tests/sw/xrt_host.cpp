// SPDX-License-Identifier: Apache-2.0
// A program for XRT's C++ API, as somebody writes it who does not know nearkv's host software:
//     xrt_host XCLBIN KV JOB QUEUE N_JOBS SUMMARY OUT HOW
// loads the pages in KV into the card, JOB into job memory, runs the queue and writes job memory to OUT.
// HOW: p2p; normal (pages through a normal buffer); leave (ends without closing anything).
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include <xrt/xrt_bo.h>
#include <xrt/xrt_device.h>
#include <xrt/xrt_kernel.h>

static std::vector<char> contents(const char* path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

int main(int, char** argv) {
    const std::string how = argv[8];
    auto* device = new xrt::device(0u);
    auto uuid = device->load_xclbin(argv[1]);
    auto* kernel = new xrt::kernel(*device, uuid, "nearkv");
    auto pages = contents(argv[2]), job = contents(argv[3]);
    auto flags = how == "normal" ? xrt::bo::flags::normal : xrt::bo::flags::p2p;
    auto* kv_bo = new xrt::bo(*device, pages.size(), flags, kernel->group_id(0));
    if (how == "normal") {
        kv_bo->write(pages.data());
        kv_bo->sync(XCL_BO_SYNC_BO_TO_DEVICE);
    } else {
        int fd = open(argv[2], O_RDONLY | O_DIRECT);
        if (fd < 0 || read(fd, kv_bo->map(), pages.size()) != static_cast<ssize_t>(pages.size())) return 3;
        close(fd);
    }
    auto* job_bo = new xrt::bo(*device, job.size(), kernel->group_id(1));
    job_bo->write(job.data());
    job_bo->sync(XCL_BO_SYNC_BO_TO_DEVICE);
    unsigned numbers[3];
    for (int i = 0; i < 3; ++i) numbers[i] = strtoul(argv[4 + i], nullptr, 10);
    auto* run = new xrt::run((*kernel)(*kv_bo, *job_bo, numbers[0], numbers[1], numbers[2]));
    if (run->wait() != ERT_CMD_STATE_COMPLETED) return 4;
    job_bo->sync(XCL_BO_SYNC_BO_FROM_DEVICE);
    std::ofstream(argv[7], std::ios::binary).write(job_bo->map<char*>(), job.size());
    if (how == "leave") exit(0);
    delete run;
    delete job_bo;
    delete kv_bo;
    delete kernel;
    delete device;
}
