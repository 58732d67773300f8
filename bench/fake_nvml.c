/* A library with NVML's functions that answers at once: what remains to be measured is the reader's own cost.
 *
 * Eight devices like an H100; every function that Corral, nvitop and gpustat ask for in their loops. The structures
 * are those of nvml.h, reduced to what is written. Built by bench/nvml.py with the system's C compiler. */

#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned int uint;
typedef unsigned long long u64;
typedef void *device;

#define OK 0
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define TIMEOUT 10

static uint count(void) {
    const char *text = getenv("FAKE_NVML_DEVICES");
    return text ? (uint)atoi(text) : 8;
}
static uint index_of(device d) { return (uint)((unsigned long)d - 0x1000) / 16; }

int nvmlInit_v2(void) { return OK; }
int nvmlInitWithFlags(uint flags) { (void)flags; return OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { (void)code; return "error"; }
static int text(char *out, uint size, const char *value) { strncpy(out, value, size); return OK; }
int nvmlSystemGetDriverVersion(char *out, uint size) { return text(out, size, "575.57.08"); }
int nvmlSystemGetNVMLVersion(char *out, uint size) { return text(out, size, "12.575.57.08"); }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { *out = 12090; return OK; }
int nvmlDeviceGetCount_v2(uint *out) { *out = count(); return OK; }
int nvmlDeviceGetHandleByIndex_v2(uint index, device *out) {
    *out = (device)(0x1000UL + index * 16UL);
    return index < count() ? OK : 2;
}
int nvmlDeviceGetIndex(device d, uint *out) { *out = index_of(d); return OK; }
int nvmlDeviceGetUUID(device d, char *out, uint size) {
    char uuid[] = "GPU-00000000-0000-0000-0000-000000000001";
    uuid[11] = (char)('0' + index_of(d) % 10);
    uuid[10] = (char)('0' + index_of(d) / 10);
    return text(out, size, uuid);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device *out) {
    *out = (device)(0x1000UL + (unsigned long)((uuid[10] - '0') * 10 + uuid[11] - '0') * 16UL);
    return OK;
}
int nvmlDeviceGetName(device d, char *out, uint size) { (void)d; return text(out, size, "NVIDIA H100 80GB HBM3"); }

#define NUMBER(function, type, value) int function(device d, type *out) { (void)d; *out = value; return OK; }
#define KEYED(function, type, value) int function(device d, uint k, type *out) { (void)d; (void)k; *out = value; return OK; }
#define PAIR(function, one, two) int function(device d, uint *a, uint *b) { (void)d; *a = one; *b = two; return OK; }

NUMBER(nvmlDeviceGetPowerUsage, uint, 512345)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, uint, 700000)
NUMBER(nvmlDeviceGetPowerManagementLimit, uint, 700000)
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, uint, 700000)
NUMBER(nvmlDeviceGetTotalEnergyConsumption, u64, 123456789012ULL)
NUMBER(nvmlDeviceGetCurrentClocksEventReasons, u64, 4)
NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, u64, 4)
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, uint, 5)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, uint, 16)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, uint, 5)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, uint, 16)
NUMBER(nvmlDeviceGetPcieReplayCounter, uint, 7)
NUMBER(nvmlDeviceGetFanSpeed, uint, 40)
NUMBER(nvmlDeviceGetNumFans, uint, 1)
NUMBER(nvmlDeviceGetPerformanceState, uint, 0)
NUMBER(nvmlDeviceGetPowerState, uint, 0)
NUMBER(nvmlDeviceGetArchitecture, uint, 9)
NUMBER(nvmlDeviceGetNumGpuCores, uint, 132 * 128)
NUMBER(nvmlDeviceGetMemoryBusWidth, uint, 5120)
NUMBER(nvmlDeviceGetComputeMode, uint, 0)
NUMBER(nvmlDeviceGetPersistenceMode, uint, 1)
NUMBER(nvmlDeviceGetDisplayActive, uint, 0)
NUMBER(nvmlDeviceGetDisplayMode, uint, 0)
NUMBER(nvmlDeviceGetSupportedEventTypes, u64, 0x1FF)
KEYED(nvmlDeviceGetClockInfo, uint, 1755)
KEYED(nvmlDeviceGetMaxClockInfo, uint, 1980)
KEYED(nvmlDeviceGetTemperature, uint, 61)
KEYED(nvmlDeviceGetTemperatureThreshold, uint, 90)
KEYED(nvmlDeviceGetFanSpeed_v2, uint, 40)
KEYED(nvmlDeviceGetPcieThroughput, uint, 222)
PAIR(nvmlDeviceGetEncoderUtilization, 3, 100000)
PAIR(nvmlDeviceGetDecoderUtilization, 4, 100000)
PAIR(nvmlDeviceGetJpgUtilization, 5, 100000)
PAIR(nvmlDeviceGetOfaUtilization, 6, 100000)
PAIR(nvmlDeviceGetPowerManagementLimitConstraints, 200000, 700000)
PAIR(nvmlDeviceGetMigMode, 0, 0)
PAIR(nvmlDeviceGetEccMode, 1, 1)
PAIR(nvmlDeviceGetCudaComputeCapability, 9, 0)

int nvmlDeviceGetUtilizationRates(device d, uint *both) { (void)d; both[0] = 87; both[1] = 42; return OK; }

struct temperature { uint version; int sensor; int value; };
int nvmlDeviceGetTemperatureV(device d, struct temperature *out) { (void)d; out->value = 61; return OK; }

struct memory { u64 total, free, used; };
int nvmlDeviceGetMemoryInfo(device d, struct memory *out) {
    (void)d;
    *out = (struct memory){80ULL << 30, 20ULL << 30, 60ULL << 30};
    return OK;
}
struct memory2 { uint version; u64 total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(device d, struct memory2 *out) {
    (void)d;
    *out = (struct memory2){out->version, 80ULL << 30, 1ULL << 29, 19ULL << 30, 60ULL << 30};
    return OK;
}
int nvmlDeviceGetBAR1MemoryInfo(device d, struct memory *out) { return nvmlDeviceGetMemoryInfo(d, out); }

int nvmlDeviceGetTotalEccErrors(device d, uint kind, uint counter, u64 *out) {
    (void)d; (void)kind; (void)counter;
    *out = 0;
    return OK;
}
int nvmlDeviceGetMemoryErrorCounter(device d, uint kind, uint counter, uint where, u64 *out) {
    (void)where;
    return nvmlDeviceGetTotalEccErrors(d, kind, counter, out);
}
int nvmlDeviceGetRemappedRows(device d, uint *a, uint *b, uint *c, uint *e) {
    (void)d;
    *a = *b = *c = *e = 0;
    return OK;
}

struct field { uint id, scope; long long timestamp, latency; uint type, code; union { double d; u64 u; } value; };
int nvmlDeviceGetFieldValues(device d, int number, struct field *fields) {
    (void)d;
    for (int i = 0; i < number; i++) {
        fields[i].type = 3;
        fields[i].code = OK;
        fields[i].value.u = fields[i].id == 230 ? 0 : 1;
    }
    return OK;
}

struct pci { char legacy[16]; uint domain, bus, device, id, subsystem; char bus_id[32]; };
int nvmlDeviceGetPciInfo_v3(device d, struct pci *out) {
    memset(out, 0, sizeof *out);
    strcpy(out->bus_id, "00000000:10:00.0");
    out->bus_id[10] = (char)('0' + index_of(d) % 10);
    return OK;
}
int nvmlDeviceGetTopologyCommonAncestor(device a, device b, uint *out) { (void)a; (void)b; *out = 10; return OK; }

int nvmlGpmQueryDeviceSupport(device d, uint *out) { (void)d; out[1] = 1; return OK; }
int nvmlGpmSampleAlloc(void **out) { *out = malloc(8); return OK; }
int nvmlGpmSampleFree(void *sample) { free(sample); return OK; }
int nvmlGpmSampleGet(device d, void *sample) { (void)d; (void)sample; return OK; }
struct gpm_metric { uint id, code; double value; const char *names[3]; };
struct gpm { uint version, number; void *one, *two; struct gpm_metric metrics[]; };
int nvmlGpmMetricsGet(struct gpm *request) {
    for (uint i = 0; i < request->number; i++) {
        request->metrics[i].code = OK;
        request->metrics[i].value = 55.5;
    }
    return OK;
}

#define NO_PROCESSES(function) int function(device d, uint *n, void *out) { (void)d; (void)out; *n = 0; return OK; }
NO_PROCESSES(nvmlDeviceGetComputeRunningProcesses)
NO_PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2)
NO_PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3)
NO_PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3)
int nvmlDeviceGetProcessUtilization(device d, void *out, uint *n, u64 since) {
    (void)d; (void)out; (void)since;
    *n = 0;
    return NOT_FOUND;
}

int nvmlEventSetCreate(void **out) { *out = (void *)1; return OK; }
int nvmlEventSetFree(void *set) { (void)set; return OK; }
int nvmlDeviceRegisterEvents(device d, u64 types, void *set) { (void)d; (void)types; (void)set; return OK; }
int nvmlEventSetWait_v2(void *set, void *out, uint milliseconds) {
    (void)set; (void)out;
    struct timespec pause = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L};
    nanosleep(&pause, NULL);
    return TIMEOUT;
}
