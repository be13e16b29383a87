cmake_minimum_required(VERSION 3.20)
project(tinyllm LANGUAGES NONE)

option(TINYLLM_WERROR "Treat warnings as errors" OFF)
option(TINYLLM_C_TESTS "Build the C tests, and not the Python module" OFF)
option(TINYLLM_MODULE "Build the Python module as well as the C tests" OFF)
option(TINYLLM_SCALAR_ONLY "Build plain C only, no vector instruction sets: slow, but quickly built" OFF)
option(TINYLLM_SANITIZE "Build the C tests under AddressSanitizer and UndefinedBehaviorSanitizer" ON)
set(TINYLLM_SANITIZERS "" CACHE STRING "Sanitizers in place of those, and for the module, as -fsanitize= takes them")
if(TINYLLM_C_TESTS AND TINYLLM_SANITIZE AND NOT TINYLLM_SANITIZERS)
  set(TINYLLM_SANITIZERS address,undefined)
endif()

include(CheckLanguage)
check_language(C)
check_language(CXX)
if(NOT CMAKE_C_COMPILER OR NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR "tinyllm is built from source here, and there is no C and C++ compiler. Install one and "
    "try again: `sudo apt-get install build-essential` (Debian, Ubuntu), `sudo dnf install gcc gcc-c++` (Fedora, "
    "RHEL), `sudo pacman -S gcc` (Arch), `apk add build-base` (Alpine), `xcode-select --install` (macOS), or in a "
    "conda environment `conda install -c conda-forge c-compiler cxx-compiler`.")
endif()
enable_language(C)
enable_language(CXX)
if(CMAKE_C_COMPILER_ID STREQUAL "GNU" AND CMAKE_C_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "${CMAKE_C_COMPILER} is GCC ${CMAKE_C_COMPILER_VERSION}; tinyllm needs GCC 11 or Clang 12. "
    "Install a newer one and name it: CC=gcc-12 CXX=g++-12 pip install .")
endif()

set(CMAKE_C_STANDARD 11)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_C_FLAGS_RELEASE "-O3 -DNDEBUG")
find_package(Threads REQUIRED)

# Every flag the numbers depend on is here: no contraction, no fast math (docs/numbers.md).
set(TINYLLM_FLAGS -ffp-contract=off -fno-math-errno -Wall -Wextra)
if(TINYLLM_WERROR)
  list(APPEND TINYLLM_FLAGS -Werror)
endif()

set(TINYLLM_SOURCES
  csrc/model.c csrc/cache.c csrc/threads.c csrc/backend_cpu.c csrc/cpu_products.c csrc/cpu_attend.c
  csrc/cpu_rows.c csrc/cpu_experts.c csrc/cpu_run.c csrc/cpu_load.c csrc/weights.c csrc/check.c csrc/memory.c csrc/source.c
  csrc/bandwidth.c csrc/numeric.c csrc/pack.c csrc/quantize.c csrc/sample.c csrc/isa/select.c csrc/isa/scalar.c)

# Each instruction set is one file with its own flags; nothing else has them. select.c asks the machine which it can run.
set(AVX2 -mavx2 -mfma -mf16c)
set(AVX512 ${AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(FLAGS_avx2 ${AVX2})
set(FLAGS_avx2vnni ${AVX2} -mavxvnni)
set(FLAGS_avx512 ${AVX512})
set(FLAGS_avx512vnni ${AVX512} -mavx512vnni)
# GCC's scheduling before it gives out registers does not see how full they are here: a third of its code was spills.
set(ARM64 $<$<C_COMPILER_ID:GNU>:-fno-schedule-insns>)
set(FLAGS_neon ${ARM64} -march=armv8-a)
set(FLAGS_neondot ${ARM64} -march=armv8.2-a+dotprod)
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" PROCESSOR)
if(TINYLLM_SCALAR_ONLY)
  set(TINYLLM_ISAS "")
  set_source_files_properties(csrc/isa/select.c PROPERTIES COMPILE_DEFINITIONS TL_SCALAR_ONLY)
elseif(PROCESSOR MATCHES "x86_64|amd64")
  set(TINYLLM_ISAS avx512vnni avx512 avx2vnni avx2)
elseif(PROCESSOR MATCHES "aarch64|arm64")
  set(TINYLLM_ISAS neondot neon)
else()
  set(TINYLLM_ISAS "")
endif()
set(ISA_OPTIMIZE -O2)
if(TINYLLM_SANITIZERS)
  set(ISA_OPTIMIZE -O1) # under sanitizers -O2 takes many times as long
endif()
foreach(isa ${TINYLLM_ISAS})
  list(APPEND TINYLLM_SOURCES csrc/isa/${isa}.c)
  set_source_files_properties(csrc/isa/${isa}.c PROPERTIES COMPILE_OPTIONS "${ISA_OPTIMIZE};${FLAGS_${isa}}")
endforeach()

add_library(tinyllm_core STATIC ${TINYLLM_SOURCES})
target_include_directories(tinyllm_core PUBLIC csrc)
target_compile_options(tinyllm_core PRIVATE ${TINYLLM_FLAGS} -fvisibility=hidden)
target_link_libraries(tinyllm_core PUBLIC Threads::Threads m)
if(TINYLLM_SANITIZERS)
  set(SANITIZE -fsanitize=${TINYLLM_SANITIZERS} -fno-sanitize-recover=all -g1 -O1)
  target_compile_options(tinyllm_core PUBLIC ${SANITIZE})
  target_link_options(tinyllm_core PUBLIC ${SANITIZE})
endif()

add_subdirectory(cuda)

if(TINYLLM_C_TESTS)
  enable_testing()
  file(GLOB C_TESTS CONFIGURE_DEPENDS tests/c/test_*.c)
  foreach(source ${C_TESTS})
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_compile_options(${name} PRIVATE ${TINYLLM_FLAGS})
    target_link_libraries(${name} PRIVATE tinyllm_core)
    add_test(NAME ${name} COMMAND ${name})
  endforeach()
  target_link_options(test_faults PRIVATE
    -Wl,--wrap=aligned_alloc,--wrap=mmap,--wrap=pthread_create,--wrap=pread)
endif()
if(TINYLLM_MODULE OR NOT TINYLLM_C_TESTS)
  find_package(Python COMPONENTS Interpreter Development.Module)
  if(NOT Python_Development.Module_FOUND)
    message(FATAL_ERROR "The headers of Python ${Python_VERSION} are missing. Install them and try again: `sudo "
      "apt-get install python3-dev` (Debian, Ubuntu) or `sudo dnf install python3-devel` (Fedora, RHEL).")
  endif()
  find_package(pybind11 CONFIG REQUIRED)
  pybind11_add_module(_core csrc/bindings.cpp)
  target_compile_options(_core PRIVATE -Wall -Wextra $<$<BOOL:${TINYLLM_WERROR}>:-Werror>)
  target_link_libraries(_core PRIVATE tinyllm_core)
  target_compile_definitions(_core PRIVATE TINYLLM_VERSION="${SKBUILD_PROJECT_VERSION}"
    TINYLLM_CUDA_BUILD="${TINYLLM_CUDA_BUILD}")
  install(TARGETS _core DESTINATION tinyllm)
endif()
