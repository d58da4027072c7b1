// SPDX-License-Identifier: Apache-2.0
// The driver of simulated cards, as the unmodified XRT loads it: libxrt_hwemu.so.2.
//
// XRT's own classes for an emulated device come from Debian's libxrt_hwemu.a and call the plain C
// functions of xrt.h; those are defined here. A card is a process that serves a socket (server.py): it has
// the card's memory, which is a file in memory, and its registers. Commands go there as they would go to a
// driver in the kernel: in a buffer that both see, whose state word the card changes.
//
// A normal buffer has memory of the host and memory of the card, and only xclSyncBO copies between them.
// A P2P buffer is the card's memory itself, mapped as a BAR would be.
//
// Sources: /usr/include/xrt/xrt.h and ert.h (libxrt-dev); XRT 2022.1, github.com/Xilinx/XRT,
// src/runtime_src/core/common/ishim.h, api/kds.cpp: what XRT expects of each function.

#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <ert.h>
#include <experimental/xrt-next.h>
#include <xclbin.h>
#include <xrt.h>
#include <deprecated/xrt.h>  // needs what xrt.h defines

#include "xrt_constants.h"  // the protocol, written by nearkv_sim.xrt

// Two members of classes that are in no public header. Their code is in XRT's libraries.
namespace xrt_core {
class device {
  public:
    void register_axlf(const axlf*);
};
std::shared_ptr<device> get_userpf_device(void* handle, unsigned index);
}  // namespace xrt_core

namespace {

struct Request {
    uint32_t op, a;
    uint64_t b, c;
    char text[64];
};
struct Reply {
    int32_t error;  // 0, or as in errno.h
    uint32_t a;
    uint64_t b, c;
    char text[64];
};
static_assert(sizeof(Request) == REQUEST_BYTES && sizeof(Reply) == REPLY_BYTES, "protocol");

constexpr uint32_t P2P = 1u << 30, EXECBUF = 1u << 31, HOST_ONLY = 1u << 29, DEVICE_ONLY = 1u << 28,
                   BANK = 0xffff;

int connect_to(const char* path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (!path || strlen(path) >= sizeof address.sun_path) return -1;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

// One message, with a file descriptor if there is one. 0, or an error.
int send_to(int socket, const void* data, size_t size, int fd = -1) {
    iovec part{const_cast<void*>(data), size};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (fd >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        cmsghdr* header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    while (sendmsg(socket, &message, MSG_NOSIGNAL) < 0)
        if (errno != EINTR) return errno;
    return 0;
}

int receive_from(int socket, Reply& reply, int* fd = nullptr) {
    iovec part{&reply, sizeof reply};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    ssize_t got;
    while ((got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) < 0)
        if (errno != EINTR) return errno;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS) {
        int came;
        memcpy(&came, CMSG_DATA(header), sizeof came);
        if (fd) *fd = came;
        else close(came);
    }
    return got == sizeof reply ? 0 : ENODEV;  // the card has gone
}

struct Buffer {
    uint32_t flags;
    size_t size;
    uint64_t address = 0;    // on the card
    char* device = nullptr;  // the card's memory, in this process
    char* host = nullptr;    // the host's
    bool owned = false;      // `host` was allocated here
    bool command = false;

    ~Buffer() {
        if (owned && host && host != device) munmap(host, size);
        if (device) munmap(device, size);
    }
};

struct Device {
    int control = -1, commands = -1, event = -1, memory = -1;
    char name[65] = {};
    unsigned slot = 0;  // on PCIe
    std::mutex mutex;  // of `buffers`, and of what is asked for by `control`
    std::map<unsigned, std::shared_ptr<Buffer>> buffers;
    std::shared_ptr<xrt_core::device> core;
    const pid_t process = getpid();

    // A process that was forked shares the connections with its parent, whose card it is.
    bool foreign() const { return getpid() != process; }

    ~Device() {
        core.reset();
        for (int fd : {control, commands, event, memory})
            if (fd >= 0) close(fd);
    }

    // 0, or a negative error. With the mutex.
    int ask(const Request& request, Reply& reply, int fd = -1, int* received = nullptr) {
        int error = foreign() ? EPERM : send_to(control, &request, sizeof request, fd);
        if (!error) error = receive_from(control, reply, received);
        if (!error) error = reply.error;
        if (error) errno = error;
        return -error;
    }

    int ask(uint32_t op, uint32_t a = 0, uint64_t b = 0, uint64_t c = 0) {
        std::lock_guard lock(mutex);
        Reply reply;
        return ask({op, a, b, c, {}}, reply);
    }

    std::shared_ptr<Buffer> find(unsigned handle) {
        std::lock_guard lock(mutex);
        auto found = buffers.find(handle);
        return found == buffers.end() ? nullptr : found->second;
    }

    // A buffer in the card's memory. With `user`, the host's part is the caller's.
    unsigned allocate(size_t size, uint32_t flags, void* user) {
        if (flags & HOST_ONLY) {
            errno = EOPNOTSUPP;  // the card has no window to the host's memory
            return NULLBO;
        }
        auto buffer = std::make_shared<Buffer>();
        buffer->flags = flags;
        buffer->size = size;
        std::lock_guard lock(mutex);
        Reply reply;
        if (int error = ask({OP_ALLOCATE, flags, size, 0, {}}, reply)) {
            errno = -error;
            return NULLBO;
        }
        void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory, reply.c);
        bool good = mapped != MAP_FAILED;
        if (good) {
            buffer->device = static_cast<char*>(mapped);
            buffer->address = reply.b;
            if (user) buffer->host = static_cast<char*>(user);
            else if (flags & P2P) buffer->host = buffer->device;
            else if (!(flags & DEVICE_ONLY)) good = add_host(*buffer);
        }
        if (!good) {
            Reply ignored;
            ask({OP_FREE, reply.a, 0, 0, {}}, ignored);
            errno = ENOMEM;
            return NULLBO;
        }
        buffers[reply.a] = buffer;
        return reply.a;
    }

    bool add_host(Buffer& buffer) {
        void* mapped = mmap(nullptr, buffer.size, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) return false;
        buffer.host = static_cast<char*>(mapped);
        return buffer.owned = true;
    }

    // A buffer for commands, which card and host both see.
    unsigned allocate_command(size_t size, uint32_t flags) {
        int fd = memfd_create("nearkv-command", MFD_CLOEXEC);
        auto buffer = std::make_shared<Buffer>();
        buffer->flags = flags;
        buffer->size = size;
        buffer->command = true;
        void* mapped = MAP_FAILED;
        if (fd >= 0 && !ftruncate(fd, size))
            mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        unsigned handle = NULLBO;
        if (mapped != MAP_FAILED) {
            buffer->device = buffer->host = static_cast<char*>(mapped);
            std::lock_guard lock(mutex);
            Reply reply;
            if (!ask({OP_ALLOCATE_COMMAND, 0, size, 0, {}}, reply, fd)) {
                handle = reply.a;
                buffers[handle] = buffer;
            }
        }
        if (fd >= 0) close(fd);
        return handle;
    }

    // The card's process has ended: its commands will not.
    void abandon() {
        std::lock_guard lock(mutex);
        for (auto& [handle, buffer] : buffers) {
            auto packet = reinterpret_cast<ert_packet*>(buffer->host);
            if (buffer->command && packet->state < ERT_CMD_STATE_COMPLETED)
                packet->state = ERT_CMD_STATE_ABORT;
        }
    }
};

Device* device_of(xclDeviceHandle handle) { return static_cast<Device*>(handle); }

bool inside(const Buffer& buffer, size_t size, size_t offset) {
    return offset <= buffer.size && size <= buffer.size - offset;
}

}  // namespace

// --- devices -------------------------------------------------------------------------------------

unsigned xclProbe() {
    const char* number = getenv(ENVIRONMENT_CARDS);
    return number ? strtoul(number, nullptr, 10) : 0;
}

unsigned xclVersion() { return 2; }

xclDeviceHandle xclOpen(unsigned index, const char*, xclVerbosityLevel) {
    auto device = std::make_unique<Device>();
    const char* path = getenv(ENVIRONMENT_SOCKET);
    device->control = connect_to(path);
    device->commands = connect_to(path);
    device->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    Reply reply{};
    if (device->control < 0 || device->commands < 0 || device->event < 0 ||
        device->ask({OP_OPEN, index, 0, 0, {}}, reply, device->event, &device->memory) ||
        device->memory < 0) {
        errno = reply.error ? reply.error : ENODEV;
        return nullptr;
    }
    memcpy(device->name, reply.text, sizeof reply.text);
    device->slot = reply.b;
    // Tell the card whose commands come by the other connection.
    Request request{OP_COMMANDS, reply.a, 0, 0, {}};
    if (send_to(device->commands, &request, sizeof request)) return nullptr;
    device->core = xrt_core::get_userpf_device(device.get(), index);
    return device.release();
}

void xclClose(xclDeviceHandle handle) { delete device_of(handle); }

int xclGetDeviceInfo2(xclDeviceHandle handle, xclDeviceInfo2* info) {
    memset(info, 0, sizeof *info);
    info->mMagic = 0x586C0C6C;
    info->mHALMajorVersion = 2;
    info->mHALMinorVersion = 0;
    info->mDMAThreads = 2;
    info->mDataAlignment = 4096;
    info->mVendorId = 0x10ee;
    info->mPciSlot = device_of(handle)->slot;
    memcpy(info->mName, device_of(handle)->name, sizeof device_of(handle)->name);
    return 0;
}

int xclLoadXclBin(xclDeviceHandle handle, const axlf* top) {
    Device* device = device_of(handle);
    size_t size = top->m_header.m_length;
    int fd = memfd_create("xclbin", MFD_CLOEXEC);
    if (fd < 0) return -errno;
    size_t done = 0;
    while (done < size) {
        ssize_t written = write(fd, reinterpret_cast<const char*>(top) + done, size - done);
        if (written <= 0) break;
        done += written;
    }
    int error = -ENOMEM;
    if (done == size) {
        std::lock_guard lock(device->mutex);
        Reply reply;
        error = device->ask({OP_LOAD, 0, size, 0, {}}, reply, fd);
    }
    close(fd);
    if (!error) device->core->register_axlf(top);
    return error;
}

int xclOpenContext(xclDeviceHandle handle, const xuid_t, unsigned unit, bool shared) {
    return device_of(handle)->ask(OP_OPEN_CONTEXT, unit, shared);
}

int xclCloseContext(xclDeviceHandle handle, const xuid_t, unsigned unit) {
    device_of(handle)->ask(OP_CLOSE_CONTEXT, unit);
    return 0;  // XRT ends the program otherwise, and a card that has gone has no contexts
}

int xclReClock2(xclDeviceHandle, unsigned short, const unsigned short*) { return 0; }
int xclLockDevice(xclDeviceHandle) { return 0; }
int xclUnlockDevice(xclDeviceHandle) { return 0; }
int xclP2pEnable(xclDeviceHandle, bool, bool) { return -EPERM; }
int xclIPName2Index(xclDeviceHandle handle, const char* name) {
    Device* device = device_of(handle);
    std::lock_guard lock(device->mutex);
    Request request{OP_UNIT, 0, 0, 0, {}};
    Reply reply;
    strncpy(request.text, name, sizeof request.text - 1);
    int error = device->ask(request, reply);
    return error ? error : static_cast<int>(reply.a);
}

// --- buffers -------------------------------------------------------------------------------------

xclBufferHandle xclAllocBO(xclDeviceHandle handle, size_t size, int, unsigned flags) {
    Device* device = device_of(handle);
    return flags & EXECBUF ? device->allocate_command(size, flags)
                           : device->allocate(size, flags, nullptr);
}

xclBufferHandle xclAllocUserPtrBO(xclDeviceHandle handle, void* user, size_t size, unsigned flags) {
    return device_of(handle)->allocate(size, flags, user);
}

void xclFreeBO(xclDeviceHandle handle, xclBufferHandle number) {
    Device* device = device_of(handle);
    std::lock_guard lock(device->mutex);
    if (!device->buffers.erase(number)) return;
    Reply reply;
    device->ask({OP_FREE, number, 0, 0, {}}, reply);
}

void* xclMapBO(xclDeviceHandle handle, xclBufferHandle number, bool) {
    auto buffer = device_of(handle)->find(number);
    return buffer ? buffer->host : nullptr;
}

int xclUnmapBO(xclDeviceHandle, xclBufferHandle, void*) { return 0; }  // when it is freed

int xclSyncBO(xclDeviceHandle handle, xclBufferHandle number, xclBOSyncDirection direction,
              size_t size, size_t offset) {
    auto buffer = device_of(handle)->find(number);
    if (!buffer || !buffer->host || !inside(*buffer, size, offset)) return -EINVAL;
    if (buffer->host == buffer->device) return 0;
    char *host = buffer->host + offset, *card = buffer->device + offset;
    if (direction == XCL_BO_SYNC_BO_TO_DEVICE) memcpy(card, host, size);
    else memcpy(host, card, size);
    return 0;
}

int xclCopyBO(xclDeviceHandle handle, xclBufferHandle to, xclBufferHandle from, size_t size,
              size_t to_offset, size_t from_offset) {
    auto target = device_of(handle)->find(to), source = device_of(handle)->find(from);
    if (!target || !source || !inside(*target, size, to_offset) ||
        !inside(*source, size, from_offset))
        return -EINVAL;
    memmove(target->device + to_offset, source->device + from_offset, size);
    return 0;
}

size_t xclWriteBO(xclDeviceHandle handle, xclBufferHandle number, const void* data, size_t size,
                  size_t offset) {
    auto buffer = device_of(handle)->find(number);
    if (!buffer || !buffer->host || !inside(*buffer, size, offset)) return -EINVAL;
    memcpy(buffer->host + offset, data, size);
    return 0;
}

size_t xclReadBO(xclDeviceHandle handle, xclBufferHandle number, void* data, size_t size,
                 size_t offset) {
    auto buffer = device_of(handle)->find(number);
    if (!buffer || !buffer->host || !inside(*buffer, size, offset)) return -EINVAL;
    memcpy(data, buffer->host + offset, size);
    return 0;
}

int xclGetBOProperties(xclDeviceHandle handle, xclBufferHandle number, xclBOProperties* properties) {
    auto buffer = device_of(handle)->find(number);
    if (!buffer) return -EINVAL;
    properties->handle = number;
    properties->flags = buffer->flags;
    properties->size = buffer->size;
    properties->paddr = buffer->address;
    return 0;
}

xclBufferExportHandle xclExportBO(xclDeviceHandle, xclBufferHandle) { return XRT_NULL_BO_EXPORT; }
xclBufferHandle xclImportBO(xclDeviceHandle, xclBufferExportHandle, unsigned) { return NULLBO; }

// Anywhere in the card's memory, past every buffer.
static ssize_t anywhere(xclDeviceHandle handle, void* data, size_t size, uint64_t address,
                        bool write) {
    Device* device = device_of(handle);
    Reply reply;
    {
        std::lock_guard lock(device->mutex);
        if (int error = device->ask({OP_LOCATE, 0, address, size, {}}, reply)) return error;
    }
    ssize_t done = write ? pwrite(device->memory, data, size, reply.c)
                         : pread(device->memory, data, size, reply.c);
    return done < 0 ? -errno : done == static_cast<ssize_t>(size) ? 0 : -EIO;
}

ssize_t xclUnmgdPread(xclDeviceHandle handle, unsigned, void* data, size_t size, uint64_t address) {
    return anywhere(handle, data, size, address, false);
}

ssize_t xclUnmgdPwrite(xclDeviceHandle handle, unsigned, const void* data, size_t size,
                       uint64_t address) {
    return anywhere(handle, const_cast<void*>(data), size, address, true);
}

// --- registers -----------------------------------------------------------------------------------

// `unit` counts compute units; ANY_UNIT: `offset` is an address of the whole register space.
static int read_register(Device* device, uint32_t unit, uint64_t offset, uint32_t* value) {
    std::lock_guard lock(device->mutex);
    Reply reply;
    int error = device->ask({OP_READ_REGISTER, unit, offset, 0, {}}, reply);
    if (!error) *value = reply.a;
    return error;
}

int xclRegRead(xclDeviceHandle handle, uint32_t unit, uint32_t offset, uint32_t* value) {
    return read_register(device_of(handle), unit, offset, value);
}

int xclRegWrite(xclDeviceHandle handle, uint32_t unit, uint32_t offset, uint32_t value) {
    return device_of(handle)->ask(OP_WRITE_REGISTER, unit, offset, value);
}

size_t xclRead(xclDeviceHandle handle, xclAddressSpace, uint64_t offset, void* data, size_t size) {
    for (size_t at = 0; at + 4 <= size; at += 4) {
        uint32_t value;
        if (read_register(device_of(handle), ANY_UNIT, offset + at, &value)) return -1;
        memcpy(static_cast<char*>(data) + at, &value, 4);
    }
    return size;
}

size_t xclWrite(xclDeviceHandle handle, xclAddressSpace, uint64_t offset, const void* data,
                size_t size) {
    for (size_t at = 0; at + 4 <= size; at += 4) {
        uint32_t value;
        memcpy(&value, static_cast<const char*>(data) + at, 4);
        if (device_of(handle)->ask(OP_WRITE_REGISTER, ANY_UNIT, offset + at, value)) return -1;
    }
    return size;
}

// --- commands ------------------------------------------------------------------------------------

int xclExecBuf(xclDeviceHandle handle, xclBufferHandle number) {
    Device* device = device_of(handle);
    auto buffer = device->find(number);
    if (!buffer || !buffer->command || device->foreign()) return -EINVAL;
    reinterpret_cast<ert_packet*>(buffer->host)->state = ERT_CMD_STATE_QUEUED;
    Request request{OP_EXECUTE, number, 0, 0, {}};
    return -send_to(device->commands, &request, sizeof request);
}

// 1 when a command has ended since the last call, 0 after the time.
int xclExecWait(xclDeviceHandle handle, int timeout_ms) {
    Device* device = device_of(handle);
    pollfd fds[2] = {{device->event, POLLIN, 0}, {device->commands, 0, 0}};
    int ready = poll(fds, 2, timeout_ms);
    if (ready < 0) return errno == EINTR ? 0 : -errno;
    if (fds[0].revents) {
        uint64_t count;
        (void)!read(device->event, &count, sizeof count);
        return 1;
    }
    if (fds[1].revents) {
        device->abandon();
        return 1;
    }
    return 0;
}

// --- what XRT wants by C++ names, and nobody uses here ------------------------------------------------

int xclUpdateSchedulerStat(xclDeviceHandle) { return 0; }
int xclInternalResetDevice(xclDeviceHandle, xclResetKind) { return -EPERM; }
int xclCmaEnable(xclDeviceHandle, bool, uint64_t) { return -EOPNOTSUPP; }
int xclCloseExportHandle(xclBufferExportHandle) { return 0; }

namespace xrt_core::query {
enum class key_type;
}

namespace xclhwemhal2 {
class HwEmShim {
  public:
    static HwEmShim* handleCheck(void*);
    uint32_t deviceQuery(xrt_core::query::key_type);
};
HwEmShim* HwEmShim::handleCheck(void*) { return nullptr; }
uint32_t HwEmShim::deviceQuery(xrt_core::query::key_type) { return 0; }
}  // namespace xclhwemhal2
